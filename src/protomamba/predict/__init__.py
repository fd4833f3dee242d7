"""From a checkpoint and many sequences to answers: next items, classes, likelihoods, vectors."""
