"""Check that an exported program (.pt2) cannot run code of whoever made it.

PyTorch warns against untrusted files for good reasons: `torch.export.load` unpickles objects that `weights_only`
refuses, evaluates sizes as Python expressions, builds source code from names, and calls any function below `torch` that
a node names. So everything in a file is checked against what `torch.export.save` writes for ordinary networks: tensors,
operators of ATen, arithmetic of sizes. Anything else is refused, and the error names the first such item.
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

# Allowed members of the archive, below its single folder.
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

# Allowed operators besides those of ATen: arithmetic of sizes, and blocks of `no_grad` and `autocast`.
_OPERATORS = re.compile(
    r"_operator\.(add|sub|mul|floordiv|truediv|mod|neg|pow|getitem|lt|le|gt|ge|eq|ne|and_|or_|not_)"
    r"|math\.(ceil|floor|trunc|sqrt)|torch\.sym_(int|float|max|min|not|ite|sum|sqrt)"
    r"|torch\.ops\.higher_order\.wrap_with_(set_grad_enabled|autocast)",
    re.ASCII,
)
_ATEN = re.compile(r"torch\.ops\.(aten|prims)\.(\w+)\.(\w+)", re.ASCII)
# Operators of ATen that access files or print.
_REFUSED_OPERATORS = ("from_file", "_print")

# Functions in expressions of sizes, as sympy prints them.
_FUNCTIONS = (
    "Symbol", "Integer", "Float", "Rational", "Add", "Mul", "Pow", "Mod", "Max", "Min", "Abs", "And", "Or", "Not",
    "FloorDiv", "CeilDiv", "CleanDiv", "ModularIndexing", "PythonMod", "Where", "CeilToInt", "FloorToInt", "TruncToInt",
    "RoundToInt", "ToFloat", "PowByNatural", "IntTrueDiv", "FloatTrueDiv", "FloatPow", "Identity", "Equality",
    "Unequality", "StrictLessThan", "LessThan", "StrictGreaterThan", "GreaterThan", "Eq", "Ne", "Lt", "Le", "Gt", "Ge",
)  # fmt: skip
_SYMBOL = re.compile(r"[a-z]{1,3}\d+", re.ASCII)
_NUMBER = re.compile(r"-?[\d.]+(e[+-]?\d+)?", re.ASCII)
_CONSTANTS = frozenset(("oo", "int_oo", "true", "false"))
_ARITHMETIC = (
    ast.Expression, ast.BinOp, ast.UnaryOp, ast.Compare, ast.BoolOp, ast.operator, ast.unaryop, ast.cmpop, ast.boolop,
    ast.Load,
)  # fmt: skip

# Methods and functions that guards may call.
_SIZE_METHODS = ("size", "stride", "storage_offset")
_GUARD_FUNCTIONS = ("max", "min", "Max", "Min", "Mod")


class Refused(Exception):
    """The file contains something that could run code. The message is a predicate, such as "contains …"."""


def check(path: Path) -> None:
    """Check that a file contains only what exported programs of ordinary networks contain.

    All members are read in the same way as by `torch.export.load`.

    Raises:
        Refused: If the file contains anything else.
        Exception: Various other errors, if the file is not an exported program.
    """
    with zipfile.ZipFile(path) as archive:
        listed = archive.namelist()
    if "serialized_exported_program.json" in listed:
        raise Refused("uses the format that PyTorch wrote before 2.8")
    reader = torch._C.PyTorchFileReader(str(path))
    records = reader.get_all_records()
    names = [name.partition("/")[2] for name in listed]
    if len({name.partition("/")[0] for name in listed}) != 1 or sorted(names) != sorted(set(records)):
        raise Refused("is an archive that different readers interpret differently")
    for name in names:
        if not _MEMBERS.fullmatch(name):
            raise Refused(f"contains the member {name!r}")
    inputs = reader.get_record(_INPUTS)
    if inputs:
        try:
            torch.load(io.BytesIO(inputs), weights_only=True)
        except Exception as error:
            raise Refused(f"contains Python objects in {_INPUTS}") from error
    for name, payload in _CONFIGS.items():
        for key, entry in json.loads(reader.get_record(name))["config"].items():
            if entry["use_pickle"] is not False or not payload.fullmatch(entry["path_name"]):
                raise Refused(f"contains a Python object in place of the tensor {key!r}")
    _check_value("", json.loads(reader.get_record(_PROGRAM)))


def _check_value(key: str, value: Any) -> None:
    """Check all strings and keys below `value`, the value under `key` of a program."""
    if isinstance(value, str):
        rule = _RULES.get(key)
        if rule is None or not rule(value):
            raise Refused(f"contains {key or 'the string'} {value[:80]!r}")
    elif isinstance(value, list):
        for member in value:
            _check_value(key, member)
    elif isinstance(value, Mapping):
        for inner, member in value.items():
            if key in _NAMED:
                _check_value(f"{key} name", inner)
                _check_value(f"{key} {inner}" if key == "metadata" else "", member)
            elif inner in _FORBIDDEN and member:
                raise Refused(f"contains {inner} {str(member)[:80]!r}")
            else:
                _check_value(inner, member)


def _is_operator(text: str) -> bool:
    """Return whether `text` names an allowed operator."""
    match = _ATEN.fullmatch(text)
    if match is None:
        return bool(_OPERATORS.fullmatch(text))
    namespace, name, overload = match.groups()
    suffix = "" if overload == "default" else f".{overload}"
    return name not in _REFUSED_OPERATORS and f"{namespace}::{name}{suffix}" in _tensor_operators()


@functools.cache
def _tensor_operators() -> frozenset[str]:
    """Return the names of all operators on tensors. Those of TorchScript, such as `aten::save`, are not included."""
    return frozenset(torch._C._dispatch_get_all_op_names())


def _nodes(text: str) -> Iterator[ast.AST]:
    """Return all syntax nodes of an expression; for invalid syntax, a node that no rule allows."""
    try:
        return ast.walk(ast.parse(text, mode="eval"))
    except (SyntaxError, ValueError):
        return iter([ast.Pass()])


def _is_size_expression(text: str) -> bool:
    """Return whether an expression is plain arithmetic of sizes; sympy evaluates it as Python code."""
    checked: set[ast.AST] = set()
    for node in _nodes(text):
        if isinstance(node, ast.Call):
            function = node.func.id if isinstance(node.func, ast.Name) else ""
            if function not in _FUNCTIONS or not all(isinstance(k.value, ast.Constant) for k in node.keywords):
                return False
            checked.add(node.func)
            strings = _string_arguments(node)
            if not all(_is_string_of(function, str(getattr(s, "value", ""))) for s in strings):
                return False
            checked.update(strings)
        elif isinstance(node, ast.Constant):
            if node not in checked and not isinstance(node.value, (int, float)):
                return False
        elif isinstance(node, ast.Name):
            if node not in checked and node.id not in _CONSTANTS and not _SYMBOL.fullmatch(node.id):
                return False
        elif not isinstance(node, (*_ARITHMETIC, ast.keyword)):
            return False
    return True


def _string_arguments(call: ast.Call) -> list[ast.expr]:
    """Return the positional and keyword arguments of a call that are string constants."""
    values = [*call.args, *(keyword.value for keyword in call.keywords)]
    return [value for value in values if isinstance(value, ast.Constant) and isinstance(value.value, str)]


def _is_string_of(function: str, text: str) -> bool:
    """Return whether a function of sympy may have this string as an argument."""
    if function == "Symbol":
        return _NAME.fullmatch(text) is not None
    return function in ("Float", "Integer", "Rational") and _NUMBER.fullmatch(text) is not None


def _is_guard(text: str) -> bool:
    """Return whether a guard only compares sizes of the inputs, as `L['x'].size()[2] >= 8` does."""
    for node in _nodes(text):
        if isinstance(node, ast.Call):
            is_method = isinstance(node.func, ast.Attribute) and node.func.attr in _SIZE_METHODS
            is_function = isinstance(node.func, ast.Name) and node.func.id in _GUARD_FUNCTIONS
            if not (is_method or is_function) or node.keywords:
                return False
        elif isinstance(node, ast.Attribute):
            if node.attr not in _SIZE_METHODS:
                return False
        elif isinstance(node, ast.Name):
            if node.id != "L" and node.id not in _GUARD_FUNCTIONS:
                return False
        elif isinstance(node, ast.Constant):
            is_name = isinstance(node.value, str) and _NAME.fullmatch(node.value)
            if not is_name and not isinstance(node.value, (int, float)):
                return False
        elif not isinstance(node, (*_ARITHMETIC, ast.Subscript)):
            return False
    return True


def _is_structure(text: str) -> bool:
    """Return whether inputs or outputs are tuples, lists and dicts with plain keys.

    PyTorch imports other types by name.
    """
    try:
        protocol, spec = json.loads(text)
    except (ValueError, TypeError):
        return False
    return protocol == 1 and _is_plain_spec(spec)


def _is_plain_spec(spec: Any) -> bool:
    types = (None, "builtins.tuple", "builtins.list", "builtins.dict", "collections.OrderedDict")
    if not isinstance(spec, Mapping) or spec.get("type") not in types:
        return False
    context = spec.get("context")
    if isinstance(context, str):
        context = json.loads(context)
    if context is None:
        context = []
    keys = context if isinstance(context, list) else [context]
    has_plain_keys = all(isinstance(key, int) or (isinstance(key, str) and _NAME.fullmatch(key)) for key in keys)
    return has_plain_keys and all(_is_plain_spec(child) for child in spec["children_spec"])


def _matches(pattern: "re.Pattern[str]") -> Callable[[str], bool]:
    return lambda text: pattern.fullmatch(text) is not None


_name, _dotted, _version, _text = (_matches(pattern) for pattern in (_NAME, _DOTTED, _VERSION, _TEXT))

# Rules for the strings under each key of a program. A string under any other key is refused.
_RULES: Mapping[str, Callable[[str], bool]] = {
    "target": _is_operator, "expr_str": _is_size_expression, "guards_code": _is_guard,
    "in_spec": _is_structure, "out_spec": _is_structure,
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

# Keys whose value is a mapping with arbitrary names as keys.
_NAMED = frozenset(key.removesuffix(" name") for key in _RULES if key.endswith(" name"))

# Keys that must be empty: objects of Python and C++, and operators passed as arguments by name.
_FORBIDDEN = ("as_custom_obj", "custom_obj", "custom_obj_values", "as_operator", "treespec_namedtuple_fields")
