"""stub"""


class StoredDraws:
    pass


def open_draws(path, folds=None):
    pass
