"""``pyllmlite.serve.ray:app``, for ``serve run``: what is deployed, and how many of it."""

from __future__ import annotations

import json
import os
from typing import Any

from pydantic import BaseModel, ConfigDict, Field
from ray import serve
from ray.serve import Application
from ray.serve.config import AutoscalingConfig, RequestRouterConfig

from pyllmlite.core.config import EngineConfig
from pyllmlite.core.errors import ConfigError
from pyllmlite.serve.ray.front import Front
from pyllmlite.serve.ray.replica import Replica
from pyllmlite.serve.server import check_packages
from pyllmlite.serve.settings import API_KEY_VARIABLE, ServeConfig

_SERVE = ("served_model_name", "max_waiting", "max_n", "max_body", "request_timeout",
          "body_timeout", "drain_timeout")  # fmt: skip


class AppArgs(BaseModel):
    """Arguments of the application; what is not named here is an option of the engine, by its
    name in :class:`EngineConfig` (``max_num_seqs=32 quantizer=rtn bits=4``).

    Attributes:
        model: Alias, hub id or path, the same on every machine.
        replicas: Engines; with ``max_replicas`` at least so many.
        max_replicas: Beyond ``replicas``: more engines are started while requests queue.
        target_ongoing: Requests, running and queued, that an engine is to have on average when
            their number is chosen; 0: as many as run at once.
        num_cpus, num_gpus: Of an engine; it runs as many threads.
        fronts: Processes that take HTTP requests and tokenize.
        imbalance: Requests that an engine may be ahead of the idlest one and still get those whose
            prefix it holds.
        message_rate: Messages per second of one engine; with many streams tokens go in larger
            pieces.
        host: Where Serve listens: on this machine only names of its own are taken.
        api_key_file: Keys, one a line, on the machines of the fronts.
        cors_origins: With commas between them.
    """

    model_config = ConfigDict(extra="allow")

    model: str | None = None
    replicas: int = Field(1, ge=1)
    max_replicas: int | None = Field(None, ge=1)
    target_ongoing: float = Field(0.0, ge=0)
    num_cpus: float = Field(1.0, gt=0)
    num_gpus: float = Field(0.0, ge=0)
    fronts: int = Field(1, ge=1)
    imbalance: int = Field(16, ge=0)
    message_rate: float = Field(100.0, gt=0)
    host: str = "127.0.0.1"
    api_key_file: str | None = None
    cors_origins: str = ""
    served_model_name: str | None = None
    max_waiting: int = 256
    max_n: int = 128
    max_body: int = 8 << 20
    request_timeout: float = 600.0
    body_timeout: float = 20.0
    drain_timeout: float = 30.0


def engine_options(args: AppArgs) -> dict[str, Any]:
    """What is left for the engine.  ``ConfigError``: it takes no such option."""
    options = {name: _value(value) for name, value in (args.model_extra or {}).items()}
    options.setdefault("threads", max(int(args.num_cpus), 1))
    config = EngineConfig.from_kwargs(model=args.model, **options)  # wrong ones are named here
    return {"model": args.model, **options, "max_num_seqs": config.max_num_seqs}


def _value(text: Any) -> Any:
    """``4`` and ``true`` out of a command line are meant as JSON has them."""
    if isinstance(text, str):
        try:
            return json.loads(text)
        except ValueError:
            pass
    return text


def app(args: AppArgs | dict[str, Any]) -> Application:
    """Engines behind one API: ``serve run pyllmlite.serve.ray:app model=... replicas=2``.

    Args:
        args: As Serve hands them over, a dict of strings or what its config file has.
    Raises:
        ConfigError: Options that cannot work, a package that is missing.
    """
    check_packages()
    if not isinstance(args, AppArgs):
        args = AppArgs(**args)
    options = engine_options(args)
    most = args.max_replicas if args.max_replicas is not None else args.replicas
    if most < args.replicas:
        raise ConfigError(f"max_replicas={most} is less than replicas={args.replicas}")
    seats = options["max_num_seqs"]
    settings = {name: getattr(args, name) for name in _SERVE}
    settings["host"] = args.host
    settings["cors_origins"] = tuple(o for o in args.cors_origins.split(",") if o)
    ServeConfig(**settings)
    number: dict[str, Any] = {"num_replicas": args.replicas}
    if most > args.replicas:
        number = {
            "autoscaling_config": AutoscalingConfig(
                min_replicas=args.replicas,
                max_replicas=most,
                target_ongoing_requests=args.target_ongoing or float(seats),
            )
        }
    engines = serve.deployment(
        Replica,
        name="Engine",
        **number,
        # A few more than run, so that a place that becomes free is taken in the next step; the
        # others wait outside, where they can still go to any engine.
        max_ongoing_requests=seats + max(seats // 8, 2),
        ray_actor_options={"num_cpus": args.num_cpus, "num_gpus": args.num_gpus},
        health_check_period_s=5.0,
        graceful_shutdown_timeout_s=args.drain_timeout,
        request_router_config=RequestRouterConfig(
            request_router_class="pyllmlite.serve.ray.router:PrefixRouter",
            request_router_kwargs={"imbalance": args.imbalance},
            request_routing_stats_period_s=1.0,
        ),
    )
    front = serve.deployment(
        Front,
        name="Front",
        num_replicas=args.fronts,
        max_ongoing_requests=ServeConfig.max_connections,
        ray_actor_options={"num_cpus": 0},
        graceful_shutdown_timeout_s=args.drain_timeout + 2,
    )
    config = EngineConfig.from_kwargs(**options)
    return front.bind(
        engines.bind(options, args.message_rate),
        args.model,
        config.tokenizer,
        config.revision,
        most,
        settings,
        args.api_key_file,
        bool(os.environ.get(API_KEY_VARIABLE)),
    )
