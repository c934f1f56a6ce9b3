"""stub"""


class StoreSink:
    pass


def read_arguments(path):
    pass
