"""What a bounded job says when it cannot or will not run. Without Spark, for the jobs that need none."""


class JobError(Exception):
    """What an operator has to do before a bounded job can run."""


class RefusedError(JobError):
    """A gate refused: nothing was changed, and the message says what to look at."""
