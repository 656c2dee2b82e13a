"""The one error of evaluation."""


class EvaluationError(ValueError):
    """Input that cannot be scored; the message names the image, record or file and what to do."""
