"""Tools that are run by people: the training compiler."""
