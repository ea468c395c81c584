"""Manual optimization under ddp_ft: optimizer steps of the user's own, in parts that can fail and are run again."""
