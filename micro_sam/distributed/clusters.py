"""Reaching workers: some on this machine, a scheduler that runs already, or jobs of a batch system."""

import contextlib
import logging
import os
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from ..core.errors import InvalidInputError, MissingPackageError

if TYPE_CHECKING:
    from distributed import Client

logger = logging.getLogger(__name__)
SCHEDULERS = ("local", "slurm", "lsf")


@contextlib.contextmanager
def connect(
    scheduler: str = "local", n_workers: int | None = None, *, job_options: Mapping[str, Any] | None = None
) -> Iterator["Client"]:
    """Start or reach a cluster, and give a client for it; what was started ends with the context.

    Args:
        scheduler: `local` for workers on this machine, one per GPU or, without GPUs, one per two cores; `tcp://…` for a
            scheduler that runs already; `slurm` or `lsf` for jobs of that batch system (dask-jobqueue).
        n_workers: Number of workers, of jobs for batch systems; None chooses it. Not for a scheduler that runs.
        job_options: Options of `dask_jobqueue.SLURMCluster` or `LSFCluster`, in addition to those in the configuration
            of dask, for example `{"queue": "gpu", "walltime": "04:00:00", "memory": "32GB"}`.

    Raises:
        InvalidInputError: For an unknown scheduler, or if a running one cannot be reached.
        MissingPackageError: If dask's packages are not installed.

    Example:
        >>> with connect("local", 2) as client:  # doctest: +SKIP
        ...     segment(client, "brain.zarr", "labels.zarr", "vit_t_lite")
    """
    try:
        from distributed import Client
    except ModuleNotFoundError as error:
        raise MissingPackageError(
            f"Work on a cluster needs {error.name}, which is not installed: pip install \"micro_sam[distributed]\"."
        ) from error
    # Comings and goings of workers and connections are not what a user wants to read between two bars.
    logging.getLogger("distributed").setLevel(logging.WARNING)
    if n_workers is not None and n_workers < 1:
        raise InvalidInputError(f"The number of workers must be at least 1, but is {n_workers}.")
    with contextlib.ExitStack() as stack:
        if scheduler == "local":
            target: Any = stack.enter_context(_local_cluster(n_workers))
        elif scheduler in ("slurm", "lsf"):
            target = stack.enter_context(_batch_cluster(scheduler, n_workers or 1, job_options or {}))
        elif "://" in scheduler:
            if n_workers is not None:
                raise InvalidInputError("A scheduler that runs already has its workers: leave out their number.")
            target = scheduler
        else:
            raise InvalidInputError(
                f"The scheduler must be one of {', '.join(SCHEDULERS)} or an address such as tcp://host:8786, but is "
                f"{scheduler!r}."
            )
        try:
            client = stack.enter_context(Client(target, timeout=30))
        except OSError as error:
            raise InvalidInputError(
                f"No scheduler answers at {scheduler} ({error}). Start one with 'dask scheduler', or use 'local'."
            ) from error
        logger.info("Dashboard of the cluster: %s", client.dashboard_link)
        yield client


def _local_cluster(n_workers: int | None) -> Any:
    """One process per GPU, which sees only this one; or processes that share the cores."""
    import torch
    from distributed import Nanny, Scheduler, SpecCluster

    # A batch system may have given this process a part of the cores only.
    n_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    n_gpus = torch.cuda.device_count()
    n_workers = n_workers or n_gpus or max(1, n_cores // 2)
    threads = max(1, n_cores // n_workers)
    workers = {}
    for k in range(n_workers):
        env = {name: str(threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
        if n_gpus:
            env["CUDA_VISIBLE_DEVICES"] = str(k % n_gpus)
        # The memory of torch is not dask's to manage: its limit would pause or kill workers.
        options = {"nthreads": 1, "env": env, "memory_limit": 0, "silence_logs": logging.WARNING}
        workers[k] = {"cls": Nanny, "options": options}
    scheduler = {"cls": Scheduler, "options": {"port": 0, "host": "127.0.0.1", "dashboard_address": "127.0.0.1:0"}}
    return SpecCluster(workers=workers, scheduler=scheduler, silence_logs=logging.WARNING)


def _batch_cluster(scheduler: str, n_jobs: int, options: Mapping[str, Any]) -> Any:
    try:
        import dask
        import dask_jobqueue
    except ModuleNotFoundError as error:
        raise MissingPackageError(
            f"The scheduler {scheduler!r} needs dask-jobqueue, which is not installed: "
            "pip install \"micro_sam[distributed]\"."
        ) from error
    kind = {"slurm": dask_jobqueue.SLURMCluster, "lsf": dask_jobqueue.LSFCluster}[scheduler]
    if "memory" not in options and dask.config.get(f"jobqueue.{scheduler}.memory", None) is None:
        raise InvalidInputError(
            f"The jobs of {scheduler} need to know their memory. Pass what your cluster asks for, for example "
            "memory=32GB and walltime=04:00:00, or write it into dask's configuration (jobqueue.yaml)."
        )
    # One process with one thread per job: the model is loaded once, and torch uses the cores of the job.
    cluster = kind(**{"cores": 1, **options, "processes": 1})
    cluster.scale(jobs=n_jobs)
    return cluster
