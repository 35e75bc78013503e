"""May this run have these data? An offer read, and judged field by field."""
