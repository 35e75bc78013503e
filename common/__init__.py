"""What institutions, coordinators and researchers share: values, accounting, ledger, model."""
