"""dlib's serialised networks, read without dlib: integers of variable length, scaled floats, tensors; nothing runs.

Format: dlib 19 and 20, `serialize.h` and `dnn/core.h`. A layer is its name, its own fields, three flags, three tensors.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cluster.errors import UserError

# What a layer's fields are, after its name: t a tensor, i an integer, r a real number, a an alias of a tensor's part.
_FIELDS = {
    "con_4": "tiiiiiiiaarrrr",
    "affine_": "taai",
    "relu_": "",
    "max_pool_2": "iiiiii",
    "avg_pool_2": "iiiiii",
    "add_prev_": "",
    "fc_2": "iitaairrrr",
}
_INPUT = "input_rgb_image_sized"
_LONGEST_NAME = 64


@dataclass(frozen=True)
class DlibLayer:
    """A layer: its name, its parameters (float32, empty where it has none), the integers among its fields."""

    name: str
    parameters: np.ndarray
    integers: tuple[int, ...]


@dataclass(frozen=True)
class DlibNetwork:
    """A network from the image on.

    mean: what is taken from red, green and blue, 0 to 255.
    rows, columns: the image's size, px.
    layers: in the order in which the image passes them.
    """

    mean: tuple[float, float, float]
    rows: int
    columns: int
    layers: tuple[DlibLayer, ...]


def read_network(path: Path) -> DlibNetwork:
    """Reads the file of a metric network (`loss_metric`) on RGB images of one size.

    Raises:
        UserError: the file is missing, cut short, goes on after its end, or is of another kind.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}; check the path") from None
    stream = _Stream(content, path)
    stream.require(stream.integer(), 1, "version")
    stream.require(stream.text(), "loss_metric_2", "loss")
    stream.reals(2)
    while (number := stream.integer()) < 3:  # versions of the layers still to come, outermost first
        pass
    stream.require(number, 3, "version of the first layer")
    stream.require(stream.text(), _INPUT, "input")
    red, green, blue = stream.reals(3)
    rows, columns = stream.integer(), stream.integer()
    layers = tuple(_layers(stream))
    return DlibNetwork((red, green, blue), rows, columns, layers)


def _layers(stream: _Stream) -> Iterator[DlibLayer]:
    first = True
    while not stream.at_end:
        name = stream.text()
        if name not in _FIELDS:
            stream.refuse(f"it has a layer '{name}'")
        yield stream.layer(name)
        if first:  # how many samples an image makes: only the layer on the input says it
            stream.require(stream.integer(), 1, "number of samples an image")
            first = False


class _Stream:
    """The content of a file, and how far it is read."""

    def __init__(self, content: bytes, path: Path) -> None:
        self.content = content
        self.path = path
        self.position = 0

    @property
    def at_end(self) -> bool:
        return self.position == len(self.content)

    def refuse(self, reason: str) -> None:
        raise UserError(f"{self.path} is not the dlib network expected: {reason}; get the file again")

    def require(self, found: object, expected: object, what: str) -> None:
        if found != expected:
            self.refuse(f"its {what} is {found!r} and not {expected!r}")

    def take(self, count: int) -> bytes:
        end = self.position + count
        if end > len(self.content):
            self.refuse(f"it ends at byte {len(self.content)}, and {count} more are due at byte {self.position}")
        piece = self.content[self.position : end]
        self.position = end
        return piece

    def integer(self) -> int:
        """A byte that holds the sign and the count of bytes, then these, the lowest first."""
        control = self.take(1)[0]
        count = control & 0x0F
        if control & 0x70 or not 1 <= count <= 8:
            self.refuse(f"byte {self.position - 1} begins no integer")
        value = int.from_bytes(self.take(count), "little")
        return -value if control & 0x80 else value

    def real(self) -> float:
        """Mantissa and binary exponent."""
        mantissa, exponent = self.integer(), self.integer()
        if abs(exponent) > 1100:
            self.refuse(f"byte {self.position} ends a number that is none")
        return mantissa * 2.0**exponent

    def reals(self, count: int) -> tuple[float, ...]:
        return tuple(self.real() for _ in range(count))

    def text(self) -> str:
        length = self.integer()
        if not 0 <= length <= _LONGEST_NAME:
            self.refuse(f"a name of {length} letters is due at byte {self.position}")
        return self.take(length).decode("latin-1")

    def tensor(self) -> np.ndarray:
        """Version, four sizes, the values flat in little-endian float32."""
        self.require(self.integer(), 2, "version of a tensor")
        sizes = [self.integer() for _ in range(4)]
        if min(sizes) < 0:
            self.refuse(f"a tensor before byte {self.position} has the size {sizes}")
        count = sizes[0] * sizes[1] * sizes[2] * sizes[3]
        return np.frombuffer(self.take(4 * count), dtype="<f4").astype(np.float32)

    def layer(self, name: str) -> DlibLayer:
        parameters, integers = np.empty(0, dtype=np.float32), []
        for field in _FIELDS[name]:
            if field == "t":
                parameters = self.tensor()
            elif field == "i":
                integers.append(self.integer())
            elif field == "r":
                self.real()
            else:
                self.require(self.integer(), 1, "version of an alias")
                self.take_integers(4)
        flags = self.take(3)
        if set(flags) - set(b"01"):
            self.refuse(f"the flags of layer '{name}' are {flags!r}")
        for _ in range(3):  # what training keeps: the gradient of the input, an output, a gradient
            self.tensor()
        return DlibLayer(name, parameters, tuple(integers))

    def take_integers(self, count: int) -> None:
        for _ in range(count):
            self.integer()
