"""The round loop, pure of any transport: plan, cohort, strategy, evaluation, commit."""
