"""Exit codes of the command line."""

CERTIFIED, NOT_CERTIFIED, BAD_ARGUMENTS, NOT_PARALLEL, LOST_HOST, INTERRUPTED = 0, 1, 2, 3, 75, 130

CODES = {
    CERTIFIED: "certified (and, where two runs are compared, they agree)",
    NOT_CERTIFIED: "not certified, or the runs differ",
    BAD_ARGUMENTS: "arguments, files or a model that cannot work",
    NOT_PARALLEL: "advise: run it sequentially",
    LOST_HOST: "another host was lost; what is in a store is safe",
    INTERRUPTED: "interrupted; what is in a store is safe",
}
"""What they mean."""
