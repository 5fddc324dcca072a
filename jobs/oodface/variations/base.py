"""What the variations share: where a face lies in its crop, and an application that knows it."""

import copy
import math
from abc import abstractmethod
from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from cluster.errors import UserError
from jobs.oodface.scenario import Draws, Images, Scenario

Plane = Float[Tensor, "batch height width"]
Each = Float[Tensor, "batch 1 1"]
Landmarks = Float[Tensor, "batch 5 2"]

# insightface's alignment target, in pixels of a crop of 112 x 112: right eye, left eye, nose tip, right and left corner
# of the mouth. The right eye is the person's own, so it has the smaller x.
ARCFACE = ((38.2946, 51.6963), (73.5318, 51.5014), (56.0252, 71.7366), (41.5493, 92.3655), (70.7299, 92.2041))
SIDE = 112
RIGHT_EYE, LEFT_EYE, NOSE, RIGHT_MOUTH, LEFT_MOUTH = range(5)
LEAST_EYES = 8.0  # pixels between the eyes below which a face has no parts that could be changed
# Eyes and mouth of ArcFace's template are 1.15 eye distances apart. A head turned aside shortens the one and not the
# other; from about 30 degrees on the height is the better measure of its size.
TURNED = 0.75
LEANING = (-1.5, 2.0)  # the heights v between which a face's middle line is taken to go on straight
MOUTH = 1.155  # the mean mouth's distance below the eyes


class Variation(Scenario):
    """A change of the face itself, placed by five landmarks.

    Args:
        template: the landmarks of an image that comes without: five (x, y) in pixels of an aligned crop of 112 x 112.
            For crops of another size they are scaled by the height and centred in the width, as aligners do.
    """

    def __init__(self, template: Sequence[tuple[float, float]] = ARCFACE) -> None:
        self.template = tuple(template)

    def apply(self, images: Images, severity: int, draws: Draws, landmarks: Landmarks | None = None) -> Images:
        """The varied images, before the final clipping.

        Args:
            images: RGB in [0, 1], float32.
            severity: 1 to 5.
            draws: of `draw`.
            landmarks: pixels (x, y) in the crop, 0 at the centre of the first one, in the order right eye, left eye,
                nose tip, right and left corner of the mouth; None for those of the template.

        Raises:
            UserError: landmarks that are no face's, or not one set an image.
        """
        height, width = images.shape[2:]
        if landmarks is None:
            landmarks = place_template(self.template, height, width).expand(len(images), 5, 2)
        return self.vary(images, Face(landmarks, images), severity, draws)

    @abstractmethod
    def vary(self, images: Images, face: "Face", severity: int, draws: Draws) -> Images:
        """The images changed at the places that `face` names."""


def place_template(template: Sequence[tuple[float, float]], height: int, width: int) -> Float[Tensor, "5 2"]:
    """Landmarks of a 112 x 112 crop in one of another size: scaled by the height, centred in the width."""
    points = torch.tensor(template, dtype=torch.float32)
    scale = height / SIDE
    centred = (points + 0.5 - torch.tensor((SIDE / 2, 0.0))) * scale
    return centred + torch.tensor((width / 2 - 0.5, -0.5))


class Face:
    """The coordinates in which all parts are drawn: u to the image's right along the eyes, v down the face.

    The origin is midway between the eyes, the unit about one distance between them, so the eyes lie near (-.5, 0) and
    (.5, 0), the nose's tip near (0, .57), the mouth near (0, 1.15), the chin near (0, 1.9).

    Attributes:
        u, v: of each pixel of the window. rows, columns: the window, at first the whole image.
        unit: pixels of one unit. pixel: units of one pixel.
    """

    def __init__(self, landmarks: Landmarks, images: Images) -> None:
        points = _require_face(landmarks, images)
        eyes = points[:, LEFT_EYE] - points[:, RIGHT_EYE]
        middle = (points[:, LEFT_EYE] + points[:, RIGHT_EYE]) / 2
        mouth = (points[:, LEFT_MOUTH] + points[:, RIGHT_MOUTH]) / 2
        apart = _length(eyes)
        self.unit = _each(torch.maximum(apart, _length(mouth - middle) * TURNED))
        self.pixel = 1 / self.unit
        along_x, along_y = (_each(one) for one in (eyes / apart[:, None]).unbind(1))
        self._right, self._down = (along_x, along_y), (-along_y, along_x)
        self._origin = tuple(_each(one) for one in middle.unbind(1))
        self._size = images.shape[2:]
        self.marks = [self.canonical(_each(points[:, at, 0]), _each(points[:, at, 1])) for at in range(5)]
        self._look(slice(0, images.shape[2]), slice(0, images.shape[3]))

    def _look(self, rows: slice, columns: slice, step: int = 1) -> None:
        self.rows, self.columns = rows, columns
        like = {"device": self.unit.device, "dtype": self.unit.dtype}
        x, y = (torch.arange(one.start, one.stop, step, **like) + (step - 1) / 2 for one in (columns, rows))
        self.u, self.v = self.canonical(x, y[:, None])
        self._fitted: tuple[Plane, Plane] | None = None

    def part(self, left: Each | float, right: Each | float, top: Each | float, bottom: Each | float) -> "Face":
        """The same face with a smaller window: the pixels between these u and v, of all samples together.

        What is drawn covers a small part of a crop, and the time goes with the number of pixels. A sample's window must
        hold all that changes in it: how far the windows of others reach beyond would show otherwise.
        """
        corners = [self.pixels(u + 0 * self.unit, v + 0 * self.unit) for u in (left, right) for v in (top, bottom)]
        bounds = []
        for places, size in zip(zip(*corners, strict=True), (self._size[1], self._size[0]), strict=True):
            first, last = torch.stack(places).aminmax()
            start = min(max(math.floor(float(first)), 0), size - 1)
            bounds.append(slice(start, min(max(math.ceil(float(last)) + 1, start + 1), size)))
        other = copy.copy(self)
        other._look(bounds[1], bounds[0])
        return other

    def fitted_part(self, left: float, right: float, top: float, bottom: float) -> "Face":
        """`part` between places of the mean face (see `fitted`)."""
        mouth_u, mouth_v = self.mouth
        wide = self.marks[LEFT_EYE][0] - self.marks[RIGHT_EYE][0]
        top, bottom = (v * mouth_v / MOUTH if v > 0 else v + 0 * mouth_v for v in (top, bottom))
        leaning = [v.clamp(*LEANING) * (mouth_u / mouth_v) for v in (top, bottom)]
        return self.part(left * wide + torch.minimum(*leaning), right * wide + torch.maximum(*leaning), top, bottom)

    def halved(self) -> "Face":
        """The same face and window with a place for every two pixels in each direction: enough for what is smooth."""
        other = copy.copy(self)
        other._look(self.rows, self.columns, 2)
        return other

    def cut(self, images: Images) -> Images:
        """The window of the images."""
        return images[:, :, self.rows, self.columns]

    def put(self, images: Images, window: Images) -> Images:
        """The images with another window."""
        result = images.clone()
        result[:, :, self.rows, self.columns] = window
        return result

    def canonical(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """(u, v) of places in pixels."""
        across, below = (x - self._origin[0]) / self.unit, (y - self._origin[1]) / self.unit
        return (
            across * self._right[0] + below * self._right[1],
            across * self._down[0] + below * self._down[1],
        )

    def pixels(self, u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """(x, y) in pixels of places in the face."""
        return (
            (u * self._right[0] + v * self._down[0]) * self.unit + self._origin[0],
            (u * self._right[1] + v * self._down[1]) * self.unit + self._origin[1],
        )

    def fitted(self) -> tuple[Plane, Plane]:
        """The window's (u, v) with the face pulled to the mean one: eyes at (+-.5, 0), mouth's middle at (0, 1.155)."""
        if self._fitted is None:
            mouth_u, mouth_v = self.mouth
            wide = self.marks[LEFT_EYE][0] - self.marks[RIGHT_EYE][0]
            leaning = self.v.clamp(*LEANING) * (mouth_u / mouth_v)
            self._fitted = (self.u - leaning) / wide, self.v.clamp(max=0) + self.v.clamp(min=0) * (MOUTH / mouth_v)
        return self._fitted

    @property
    def mouth(self) -> tuple[Each, Each]:
        """(u, v) of the mouth's middle."""
        right, left = self.marks[RIGHT_MOUTH], self.marks[LEFT_MOUTH]
        return (right[0] + left[0]) / 2, (right[1] + left[1]) / 2

    @property
    def turned(self) -> Each:
        """How far the nose's tip lies off the face's middle line, in units, at most .3: to where the head is turned."""
        mouth_u, mouth_v = self.mouth
        nose_u, nose_v = self.marks[NOSE]
        return (nose_u - nose_v * (mouth_u / mouth_v)).clamp(-0.3, 0.3)


def fitting(landmarks: Landmarks, images: Images, template: Sequence[tuple[float, float]] = ARCFACE) -> Landmarks:
    """Landmarks that every variation can use: those that are no face's (NaN too) become the template's."""
    points = landmarks.to(images.device, torch.float32)
    placed = place_template(template, *images.shape[2:]).to(images.device)
    return torch.where(_are_faces(points)[:, None, None], points, placed)


def _require_face(landmarks: Landmarks, images: Images) -> Landmarks:
    """The landmarks on the images' device, in float32.

    Raises:
        UserError: they are no face's.
    """
    if landmarks.shape != (len(images), 5, 2):
        wanted = f"({len(images)}, 5, 2)"
        raise UserError(f"landmarks of shape {tuple(landmarks.shape)} do not fit {len(images)} images; give {wanted}")
    points = landmarks.to(images.device, torch.float32)
    good = _are_faces(points)
    if not bool(good.all()):
        at = int((~good).to(torch.uint8).argmax())
        shown = ", ".join(f"({x:.4g}, {y:.4g})" for x, y in points[at].tolist())
        raise UserError(
            f"landmarks {shown} of image {at} are no face's; give right eye (the one with the smaller x), left eye, "
            f"nose tip, right and left corner of the mouth, with the eyes at least {LEAST_EYES:g} pixels apart"
        )
    return points


def _are_faces(points: Landmarks) -> Bool[Tensor, " batch"]:
    eyes = points[:, LEFT_EYE] - points[:, RIGHT_EYE]
    lower = points[:, RIGHT_MOUTH] + points[:, LEFT_MOUTH] - points[:, RIGHT_EYE] - points[:, LEFT_EYE]
    mouth = points[:, LEFT_MOUTH] - points[:, RIGHT_MOUTH]
    apart = _length(eyes)
    # a mouth above the eyes, or the person's left taken for the image's left, is the order of another detector
    below = eyes[:, 0] * lower[:, 1] - eyes[:, 1] * lower[:, 0]
    aside = eyes[:, 0] * mouth[:, 0] + eyes[:, 1] * mouth[:, 1]
    upright = (below > 0.8 * apart**2) & (aside > 0.2 * apart**2) & (eyes[:, 0] > 0)
    return upright & (apart >= LEAST_EYES) & points.isfinite().all(2).all(1)


def _each(one: Float[Tensor, " batch"]) -> Each:
    return one[:, None, None]


def _length(vectors: Float[Tensor, "batch 2"]) -> Float[Tensor, " batch"]:
    return (vectors[:, 0].square() + vectors[:, 1].square()).sqrt()
