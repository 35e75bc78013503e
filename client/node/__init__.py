"""The operator's folder: who this institution is, whom it trusts, what it allows, what left it."""
