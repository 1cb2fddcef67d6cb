__version__ = "0.2.0"

_WHERE = {  # what a user needs -> the module that has it, and its name there
    "load": ("model", "load_model"),
    "load_scene": ("scene_file", "load_scene"),
    "PandaSet": ("pandaset", "PandaSet"),
}


def __getattr__(name: str):
    "What a user needs, imported when first asked for; a scene's methods are found by `flux4d.lazy_methods`."
    from importlib import import_module

    if name not in _WHERE:
        raise AttributeError(f"module 'flux4d' has no attribute {name!r}")
    module, attribute = _WHERE[name]
    return getattr(import_module(f"flux4d.{module}"), attribute)


def __dir__():
    "Names of the package, those that are not imported yet among them."
    return sorted({*globals(), *_WHERE})
