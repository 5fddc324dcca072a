"""Data sets of the Hugging Face hub, from the network or its local cache, and what a user is told where one is not."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cluster.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset


def load_table(name: str, subset: str | None, split: str, key: str, remedy: str) -> Dataset:
    """One split of a data set of the hub.

    Args:
        name: owner/name.
        key: of the configuration, which named it. remedy: what to do where it lacks the subset or split.

    Raises:
        UserError: no such data set, no network and no copy in the cache, no such subset or split, or a data set that a
            script of its authors makes.
    """
    import datasets

    try:
        return datasets.load_dataset(name, subset, split=split)
    except datasets.exceptions.DatasetNotFoundError:
        raise UserError(f"the hub has no data set {name} that you may read; check {key}") from None
    except OSError:
        part = f" ({subset})" if subset else ""
        raise UserError(
            f"data set {name}{part} is not in the local cache and the hub cannot be reached; load it where there is a "
            f"network, or name a local folder in {key}"
        ) from None
    except RuntimeError as error:
        if "script" not in str(error):
            raise
        told = str(error).splitlines()[0]
        raise UserError(
            f"data set {name} is made by a script of its authors, which is not run ({told}); name a copy of it in "
            f"parquet in {key}"
        ) from None
    except (ValueError, datasets.exceptions.DatasetsError) as error:
        told = str(error).splitlines()[0]
        raise UserError(
            f"data set {name} gives no split {split} of {subset or 'its default subset'} ({told}); {remedy}"
        ) from None
