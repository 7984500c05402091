"""The user's configuration as frozen typed objects: study, search space, command."""
