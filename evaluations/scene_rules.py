"""GenEval's rules for what a scene of digits must show, over what a finder found in its image."""

from core.errors import UserError, unknown_name
from data.compositions import DIGITS, PALETTE, RELATIONS, TAGS, relations
from evaluations.scene_finder import Found


def faults(found: list[Found], scene: dict) -> list[str]:
    """What an image lacks of what a scene asks for; nothing where it is correct.

    Of each class of `include`, the `count` surest findings count: there must be so many, in the
    colour if one is asked for, and each in the relation to all those of the earlier entry. Of each
    class of `exclude` there must be fewer than `count`. What else stands there does not matter.

    Args:
        found: in the image, the surest first.
        scene: that `check_scene` takes.
    """
    reasons = []
    matched: list[list[Found] | None] = []
    for item in scene["include"]:
        ours = [one for one in found if one.digit == item["class"]][: item["count"]]
        wrong = _lacking(ours, item, matched)
        reasons += [wrong] if wrong else []
        matched.append(None if wrong else ours)
    for item in scene.get("exclude", []):
        number = sum(one.digit == item["class"] for one in found)
        if number >= item["count"]:
            reasons.append(f"expected {item['class']}<{item['count']}, found {number}")
    return reasons


def _lacking(ours: list[Found], item: dict, matched: list[list[Found] | None]) -> str | None:
    """What is wrong with the findings for one entry of `include`.

    Args:
        ours: the surest of its class, `count` at most.
        item: the entry.
        matched: findings of earlier entries, None for those that were not met.
    """
    name, count, color = item["class"], item["count"], item.get("color")
    if len(ours) < count:
        return f"expected {name}>={count}, found {len(ours)}"
    colors = [one.color for one in ours]
    if color is not None and colors.count(color) < count:
        return f"expected {color} {name}>={count}, found {', '.join(colors)}"
    if "position" in item:
        relation, earlier = item["position"]
        targets = matched[earlier]
        if targets is None:
            return f"no target for {name} to be {relation}"
        for one in ours:
            for target in targets:
                true = relations(one.quadrant, target.quadrant)
                if relation not in true:
                    return f"expected {name} {relation} target, found {' and '.join(sorted(true))}"
    return None


def check_scene(scene: dict) -> None:
    """Refuse what is no description of a scene of digits.

    Raises:
        UserError: naming what is wrong.
    """
    if scene.get("tag") not in TAGS:
        raise unknown_name("tag", scene.get("tag"), TAGS)
    if not isinstance(scene.get("unseen", False), bool):
        raise UserError(f"unseen: {scene['unseen']!r} is not allowed; wanted: true, false")
    for side in ("include", "exclude"):
        items = scene.get(side, [])
        if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
            raise UserError(f"{side}: no list of objects")
        for number, item in enumerate(items):
            _check_item(f"{side}[{number}]", item, number)
    if not scene.get("include"):
        raise UserError("include: no list of objects")


def _check_item(where: str, item: dict, number: int) -> None:
    if item.get("class") not in DIGITS:
        raise unknown_name(f"{where}.class", item.get("class"), DIGITS)
    if type(item.get("count")) is not int or item["count"] < 1:
        raise UserError(f"{where}.count: {item.get('count')!r} is no whole number above 0")
    if "color" in item and item["color"] not in PALETTE:
        raise unknown_name(f"{where}.color", item["color"], PALETTE)
    if "position" in item:
        place = item["position"]
        pair = isinstance(place, list) and len(place) == 2
        if not pair or place[0] not in RELATIONS or place[1] not in range(number):
            raise UserError(
                f"{where}.position: {place!r} is not allowed; wanted: one of "
                f"{', '.join(RELATIONS)}, and the number of an earlier entry"
            )
