"""`lightning-eff verify-resume`: does a script's run go on exactly after it was killed?"""
