"""Arguments that are not yet checked. None; whoever adds one here owes its checks.

Name of the constructor or function -> its arguments. An entry that is no longer needed fails the test.
`python -m tests.fuzz` prints the table as it is.
"""

KNOWN: dict[str, str] = {}
