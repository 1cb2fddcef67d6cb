__version__ = "0.1.0"


def __getattr__(name: str):
    "What a user needs, imported when first asked for."
    from importlib import import_module

    where = {"load": ("model", "load_model"), "PandaSet": ("pandaset", "PandaSet")}
    if name not in where:
        raise AttributeError(f"module 'flux4d' has no attribute {name!r}")
    module, attribute = where[name]
    return getattr(import_module(f"flux4d.{module}"), attribute)
