"""What institutions, coordinators and researchers share: values, privacy accounting, the ledger, the model."""
