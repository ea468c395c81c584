"""`lightning-eff launch`: replicas as processes, supervised on each machine."""
