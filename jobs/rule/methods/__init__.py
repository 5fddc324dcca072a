"""The methods that RULE is compared with, a file each; `find` gives a method by its name in the field.

A method is a file here, named as the method in lower case, that defines `METHOD`. Those that unlearn a corpus take a
retain term: NPO+GDR, NPO+KLR.
"""

import difflib
import pkgutil
from importlib import import_module
from typing import TYPE_CHECKING

from cluster.errors import UserError

if TYPE_CHECKING:
    from jobs.rule.methods.base import Method

RULE, STEERING_ONLY, PROMPT_ONLY = "RULE", "RS", "ICU"
RETAIN_TERMS = ("GDR", "KLR")
_SUPPORT = ("base", "retain")


def names() -> list[str]:
    """Every name that `rule.method` takes: RULE, its first stage alone (RS), a prompt alone (ICU), the files here."""
    found = []
    for name in _files():
        method = import_module(f"{__name__}.{name}").METHOD
        found.append(method.name)
        if method.takes_retain_term:
            found += [f"{method.name}+{term}" for term in RETAIN_TERMS]
    return [RULE, STEERING_ONLY, PROMPT_ONLY, *sorted(found)]


def find(name: str) -> "Method | None":
    """The method of that name that trains on texts, its retain term set; None for RULE, RS and ICU.

    Raises:
        UserError: there is none; the nearest is named.
    """
    if name in (RULE, STEERING_ONLY, PROMPT_ONLY):
        return None
    base, _, term = name.partition("+")
    if base.lower() in _files():
        method = import_module(f"{__name__}.{base.lower()}").METHOD
        if method.name == base and not term:
            return method
        if method.name == base and method.takes_retain_term and term in RETAIN_TERMS:
            return method.with_retain_term(term)
    known = {one.upper(): one for one in names()}
    nearest = known[difflib.get_close_matches(name.upper(), known, n=1, cutoff=0)[0]]
    raise UserError(f"rule.method = {name} is no method; the nearest is {nearest}, all are {', '.join(known.values())}")


def _files() -> list[str]:
    return [module.name for module in pkgutil.iter_modules(__path__) if module.name not in _SUPPORT]
