"Learning from missing data with deep generative models."

from importlib import import_module

__version__ = "0.1.0"

_HOME = {  # public name → the module that defines it; imported on first use, so that `import missingbook` stays light
    "Table": "foundations.data",
    "load": "foundations.data",
    "MeanImputer": "foundations.classics",
    "MedianImputer": "foundations.classics",
    "NeighboursImputer": "foundations.classics",
    "LinearICEImputer": "foundations.classics",
    "MICEImputer": "foundations.classics",
    "MissForestImputer": "foundations.classics",
    "ExtraTreesImputer": "foundations.classics",
    "SoftSVDImputer": "foundations.classics",
    "DeepImputer": "foundations.imputer",
    "AutoencoderImputer": "foundations.autoencoder",
    "GaussianImputer": "gaussian.em",
    "MCFlowImputer": "flows.mcflow",
    "PRFlowImputer": "flows.prflow",
    "EMFlowImputer": "flows.emflow",
    "MissingGlowImputer": "flows.missing_glow",
    "GAINImputer": "gans.gain",
    "MisGANImputer": "gans.misgan",
    "MIWAEImputer": "vaes.miwae",
    "VAEACImputer": "vaes.vaeac",
    "GSNNImputer": "vaes.gsnn",
    "MarginalizerImputer": "vaes.marginalizer",
}
__all__ = sorted(_HOME)


def __getattr__(name: str):
    if name in _HOME:
        return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
