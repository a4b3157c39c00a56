"""The configuration: typed, frozen and strict, with the sentences that refuse it. Free of torch."""

from clif.config.jobs import JobsConfig
from clif.config.load import (
    QUALITY_METRICS,
    CodeLanguage,
    LoadConfig,
    MetricsConfig,
    QualityConfig,
    QualityMetric,
    TraceConfig,
)
from clif.config.model import AdapterConfig, EngineConfig, ModelConfig
from clif.config.run import DistConfig, LayoutConfig, RunConfig
from clif.config.schema import Config, DataConfig, SloConfig, config_from_tree, load_config
from clif.config.serve import HttpConfig, ServeConfig
from clif.config.train import ControlConfig, FederationConfig, TrainConfig
from clif.errors import ConfigError

__all__ = [
    "AdapterConfig",
    "CodeLanguage",
    "Config",
    "ConfigError",
    "ControlConfig",
    "DataConfig",
    "DistConfig",
    "EngineConfig",
    "FederationConfig",
    "HttpConfig",
    "JobsConfig",
    "LayoutConfig",
    "LoadConfig",
    "MetricsConfig",
    "ModelConfig",
    "QUALITY_METRICS",
    "QualityConfig",
    "QualityMetric",
    "RunConfig",
    "ServeConfig",
    "SloConfig",
    "TraceConfig",
    "TrainConfig",
    "config_from_tree",
    "load_config",
]
