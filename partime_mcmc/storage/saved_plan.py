"""stub"""


def unpack_plan(*a):
    pass
