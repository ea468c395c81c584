"""Arguments that are not yet checked: of which, and whose checks are to come. The aim is an empty table.

Name of the constructor or function -> its arguments. An entry that is no longer needed fails the test.
`python -m tests.fuzz` prints the table as it is.
"""

KNOWN: dict[str, str] = {}
