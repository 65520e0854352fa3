"""Memory and least time of a job on a GPU that is not here, from its compiled programs."""
