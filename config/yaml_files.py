"""YAML files as plain values; what is wrong with one is a line that names the place."""

from pathlib import Path
from typing import Any

import yaml

from core.errors import ConfigError


class _Loader(yaml.SafeLoader):
    """Refuses a key that stands twice in a mapping; YAML itself lets the last one win."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        first: dict[str, int] = {}
        for key, _ in node.value:
            line = key.start_mark.line + 1
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                if key.value in first:
                    raise yaml.constructor.ConstructorError(
                        problem=f"{key.value}: stands twice, first in line {first[key.value]}",
                        problem_mark=key.start_mark,
                    )
                first[key.value] = line
        return super().construct_mapping(node, deep)


def read_yaml(path: Path) -> Any:
    """The values in a YAML file.

    Raises:
        ConfigError: it cannot be read, or is no YAML, or has a key twice.
    """
    try:
        return yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except OSError as error:
        reason = error.strerror
    except UnicodeDecodeError as error:
        reason = f"byte {error.start} is no UTF-8"
    except yaml.MarkedYAMLError as error:
        line = "" if error.problem_mark is None else f"line {error.problem_mark.line + 1}: "
        reason = f"{line}{error.problem or error.context}"
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split())
    raise ConfigError(f"{path}: not a readable YAML file: {reason}")
