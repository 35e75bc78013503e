"""What institutions, coordinators and researchers share.

Values, privacy accounting, the ledger, the model.
"""
