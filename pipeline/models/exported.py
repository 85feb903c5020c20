"""Exported programs (.pt2): whether reading and running one can run code of whoever made it.

PyTorch warns against files of strangers for good reasons: `torch.export.load` unpickles what `weights_only` refuses,
evaluates sizes as Python expressions, builds source code from names, and calls whatever a node names below `torch`.
So everything in a file is checked against what `torch.export.save` writes of ordinary networks: tensors, operators of
ATen, arithmetic of sizes. What is not known is refused. The words of an error say what was met first.
"""

import ast
import functools
import io
import json
import re
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

# Members of the archive, below its one folder.
_MEMBERS = re.compile(
    r"models/model\.json|data/sample_inputs/model\.pt|data/weights/model_weights_config\.json|data/weights/weight_\d+"
    r"|data/constants/model_constants_config\.json|data/constants/tensor_\d+|extra/[\w.-]+"
    r"|archive_format|archive_version|byteorder|\.data/(version|serialization_id)",
    re.ASCII,
)
_PROGRAM, _INPUTS = "models/model.json", "data/sample_inputs/model.pt"
_CONFIGS = {
    "data/weights/model_weights_config.json": re.compile(r"weight_\d+", re.ASCII),
    "data/constants/model_constants_config.json": re.compile(r"tensor_\d+", re.ASCII),
}

_NAME = re.compile(r"[A-Za-z_]\w*", re.ASCII)
_DOTTED = re.compile(r"[\w.@-]*", re.ASCII)
_VERSION = re.compile(r"[\w.+<=>-]*", re.ASCII)
_TEXT = re.compile(r"[^\x00-\x08\x0b-\x1f\x7f]*")

# Operators besides those of ATen: arithmetic of sizes, and blocks of `no_grad` and `autocast`.
_OPERATORS = re.compile(
    r"_operator\.(add|sub|mul|floordiv|truediv|mod|neg|pow|getitem|lt|le|gt|ge|eq|ne|and_|or_|not_)"
    r"|math\.(ceil|floor|trunc|sqrt)|torch\.sym_(int|float|max|min|not|ite|sum|sqrt)"
    r"|torch\.ops\.higher_order\.wrap_with_(set_grad_enabled|autocast)",
    re.ASCII,
)
_ATEN = re.compile(r"torch\.ops\.(aten|prims)\.(\w+)\.(\w+)", re.ASCII)
_REFUSED = ("from_file", "_print")

# Functions in the expressions of sizes, as sympy writes them.
_FUNCTIONS = (
    "Symbol", "Integer", "Float", "Rational", "Add", "Mul", "Pow", "Mod", "Max", "Min", "Abs", "And", "Or", "Not",
    "FloorDiv", "CeilDiv", "CleanDiv", "ModularIndexing", "PythonMod", "Where", "CeilToInt", "FloorToInt", "TruncToInt",
    "RoundToInt", "ToFloat", "PowByNatural", "IntTrueDiv", "FloatTrueDiv", "FloatPow", "Identity", "Equality",
    "Unequality", "StrictLessThan", "LessThan", "StrictGreaterThan", "GreaterThan", "Eq", "Ne", "Lt", "Le", "Gt", "Ge",
)  # fmt: skip
_SYMBOL = re.compile(r"[a-z]{1,3}\d+", re.ASCII)
_CONSTANTS = frozenset(("oo", "int_oo", "true", "false"))
_ARITHMETIC = (
    ast.Expression, ast.BinOp, ast.UnaryOp, ast.Compare, ast.BoolOp, ast.operator, ast.unaryop, ast.cmpop, ast.boolop,
    ast.Load,
)  # fmt: skip


class Refused(Exception):
    """What a file holds that could run code."""


def check(path: Path) -> None:
    """Raise `Refused` unless a file holds nothing but what exported programs of ordinary networks hold.

    Everything is read as `torch.export.load` reads it. Raises other errors for a file that is none.
    """
    with zipfile.ZipFile(path) as archive:
        listed = archive.namelist()
    if "serialized_exported_program.json" in listed:
        raise Refused("the format that PyTorch wrote before 2.8")
    reader = torch._C.PyTorchFileReader(str(path))
    seen = reader.get_all_records()
    names = [name.partition("/")[2] for name in listed]
    if len({name.partition("/")[0] for name in listed}) != 1 or sorted(names) != sorted(set(seen)):
        raise Refused("an archive that two readers understand differently")
    for name in names:
        if not _MEMBERS.fullmatch(name):
            raise Refused(f"the member {name!r}")
    inputs = reader.get_record(_INPUTS)
    if inputs:
        try:
            torch.load(io.BytesIO(inputs), weights_only=True)
        except Exception as error:
            raise Refused(f"Python objects in {_INPUTS}") from error
    for name, payload in _CONFIGS.items():
        for key, entry in json.loads(reader.get_record(name))["config"].items():
            if entry["use_pickle"] is not False or not payload.fullmatch(entry["path_name"]):
                raise Refused(f"a Python object in the place of the tensor {key!r}")
    _check("", json.loads(reader.get_record(_PROGRAM)))


def _check(key: str, value: Any) -> None:
    """Every text below `value`, which stands under `key` of a program, and every key of it."""
    if isinstance(value, str):
        rule = _RULES.get(key)
        if rule is None or not rule(value):
            raise Refused(f"{key or 'a text'} {value[:80]!r}")
    elif isinstance(value, list):
        for member in value:
            _check(key, member)
    elif isinstance(value, Mapping):
        for inner, member in value.items():
            if key in _NAMED:
                _check(f"{key} name", inner)
                _check(f"{key} {inner}" if key == "metadata" else "", member)
            elif inner in _FORBIDDEN and member:
                raise Refused(f"{inner} {str(member)[:80]!r}")
            else:
                _check(inner, member)


def _target(text: str) -> bool:
    found = _ATEN.fullmatch(text)
    if found is None:
        return bool(_OPERATORS.fullmatch(text))
    space, name, overload = found.groups()
    suffix = "" if overload == "default" else f".{overload}"
    return name not in _REFUSED and f"{space}::{name}{suffix}" in _on_tensors()


@functools.cache
def _on_tensors() -> frozenset[str]:
    """The operators on tensors: TorchScript's own, such as `aten::save`, are not among them."""
    return frozenset(torch._C._dispatch_get_all_op_names())


def _tree(text: str) -> Iterator[ast.AST]:
    try:
        return ast.walk(ast.parse(text, mode="eval"))
    except (SyntaxError, ValueError):
        return iter([ast.Pass()])  # which no rule allows


def _size(text: str) -> bool:
    """Whether an expression is arithmetic of sizes, for sympy evaluates it as Python code."""
    names: set[ast.AST] = set()
    for node in _tree(text):
        if isinstance(node, ast.Call):
            function = node.func.id if isinstance(node.func, ast.Name) else ""
            if function not in _FUNCTIONS or not all(isinstance(k.value, ast.Constant) for k in node.keywords):
                return False
            names.add(node.func)
            numbers = r"-?[\d.]+(e[+-]?\d+)?" if function in ("Float", "Integer", "Rational") else _NAME.pattern
            texts = [a for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str)]
            texts += [k.value for k in node.keywords if isinstance(getattr(k.value, "value", None), str)]
            allowed = function in ("Symbol", "Float", "Integer", "Rational")
            if not all(allowed and re.fullmatch(numbers, str(getattr(t, "value", "")), re.ASCII) for t in texts):
                return False
            names.update(texts)
        elif isinstance(node, ast.Constant):
            if node not in names and not isinstance(node.value, (int, float)):
                return False
        elif isinstance(node, ast.Name):
            if (
                node not in names
                and node.id not in _CONSTANTS
                and not re.fullmatch(r"[a-z]{1,3}\d+", node.id, re.ASCII)
            ):
                return False
        elif not isinstance(node, (*_ARITHMETIC, ast.keyword)):
            return False
    return True


def _guard(text: str) -> bool:
    """Whether a guard compares sizes of the inputs: `L['x'].size()[2] >= 8`."""
    for node in _tree(text):
        if isinstance(node, ast.Call):
            sizes = isinstance(node.func, ast.Attribute) and node.func.attr in ("size", "stride", "storage_offset")
            function = isinstance(node.func, ast.Name) and node.func.id in ("max", "min", "Max", "Min", "Mod")
            if not (sizes or function) or node.keywords:
                return False
        elif isinstance(node, ast.Attribute):
            if node.attr not in ("size", "stride", "storage_offset"):
                return False
        elif isinstance(node, ast.Name):
            if node.id not in ("L", "max", "min", "Max", "Min", "Mod"):
                return False
        elif isinstance(node, ast.Constant):
            name = isinstance(node.value, str) and _NAME.fullmatch(node.value)
            if not name and not isinstance(node.value, (int, float)):
                return False
        elif not isinstance(node, (*_ARITHMETIC, ast.Subscript)):
            return False
    return True


def _structure(text: str) -> bool:
    """Whether inputs or outputs are tuples, lists and dicts with plain keys; other types are imported by name."""

    def known(spec: Any) -> bool:
        kinds = (None, "builtins.tuple", "builtins.list", "builtins.dict", "collections.OrderedDict")
        if not isinstance(spec, Mapping) or spec.get("type") not in kinds:
            return False
        context = json.loads(spec["context"]) if isinstance(spec.get("context"), str) else spec.get("context")
        keys = context if isinstance(context, list) else [] if context is None else [context]
        plain = all(isinstance(k, int) or (isinstance(k, str) and _NAME.fullmatch(k)) for k in keys)
        return plain and all(known(child) for child in spec["children_spec"])

    try:
        protocol, spec = json.loads(text)
    except (ValueError, TypeError):
        return False
    return protocol == 1 and known(spec)


def _matches(pattern: "re.Pattern[str]") -> Callable[[str], bool]:
    return lambda text: pattern.fullmatch(text) is not None


_name, _dotted, _version, _text = (_matches(pattern) for pattern in (_NAME, _DOTTED, _VERSION, _TEXT))

# What a text under a key of the program may be. There is no rule for other keys: a text there is refused.
_RULES: Mapping[str, Callable[[str], bool]] = {
    "target": _target, "expr_str": _size, "guards_code": _guard, "in_spec": _structure, "out_spec": _structure,
    "name": lambda text: not text or _name(text), "as_name": _name, "forward_arg_names": _name,
    "user_input_name": _name,
    "parameter_name": _dotted, "buffer_name": _dotted, "tensor_constant_name": _dotted, "fqn": _dotted,
    "type": _name, "verifiers": _name, "torch_version": _version, "as_string": _text, "as_strings": _text,
    "metadata name": _name, "metadata stack_trace": _text, "metadata nn_module_stack": _text,
    "metadata torch_fn": _text, "metadata from_node": _text,
    "metadata source_fn_stack": _matches(re.compile(r"[\w.,;<>' -]*", re.ASCII)),
    "tensor_values name": _name, "sym_int_values name": _name, "sym_bool_values name": _name,
    "sym_float_values name": _name, "opset_version name": _name, "range_constraints name": _name,
    "as_string_to_argument name": _name,
}  # fmt: skip

# Keys whose value is a mapping from names that the file chooses.
_NAMED = frozenset(key.removesuffix(" name") for key in _RULES if key.endswith(" name"))

# Objects of Python and of C++, and operators by name as arguments.
_FORBIDDEN = ("as_custom_obj", "custom_obj", "custom_obj_values", "as_operator", "treespec_namedtuple_fields")
