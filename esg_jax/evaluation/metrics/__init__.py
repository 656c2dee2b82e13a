"""The metrics: numpy in, numbers out. Nothing here reads files or knows what made a prediction."""
