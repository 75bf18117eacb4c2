"""Every reason that the sources give for a decline, found without running them.

A reason is a text that reaches one of a few places: the first argument of ``Decline``, a call of ``decline``, one of
`FIELDS`. From there it is followed backwards: through names of the same function, arguments of its callers, constants
of modules, and what called functions return. An expression that cannot be followed raises `Unreadable`, so that no
reason can hide behind it.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

FIELDS = ("declined", "shortfall", "fell_back", "unsupported", "reasons", "influence_missing", "hidden_missing")
"""Attributes, report fields, arguments and lists that hold nothing but reasons."""

_PASSED_ON = ("reason", *FIELDS)
"""Attributes whose value was put there as a reason, and so is found there."""

_ADDS = ("append", "extend", "insert")

_PREFIXED = re.compile(r"(?:embeddings|unavailable):(\w+)")
"""How a report says that a part of a policy is missing, where it is not followed."""

Function = ast.FunctionDef | ast.AsyncFunctionDef


class Unreadable(AssertionError):
    """A reason is made in a way that `found_in` does not follow; the message says where."""


def found_in(files: list[Path]) -> set[str]:
    """The reasons in these Python files. Raises Unreadable."""
    sources = _Sources({file: ast.parse(file.read_text(encoding="utf-8")) for file in files})
    return set(sources.reasons())


class _Sources:
    def __init__(self, modules: dict[Path, ast.Module]) -> None:
        self._modules = modules
        self._constants: dict[str, ast.expr] = {}
        self._functions: dict[str, list[Function]] = {}
        self._followed: set[ast.AST] = set()
        for module in modules.values():
            for node in module.body:
                if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                    self._constants[node.targets[0].id] = node.value
            for node in ast.walk(module):
                if isinstance(node, Function):
                    self._functions.setdefault(node.name, []).append(node)

    def reasons(self) -> Iterator[str]:
        for file, module in self._modules.items():
            for node in ast.walk(module):
                if isinstance(node, ast.Constant) and (found := _PREFIXED.fullmatch(str(node.value))):
                    yield found[1]
            for scope in ast.walk(module):
                if isinstance(scope, Function | ast.ClassDef):
                    for node in _inside(scope):
                        for given in _given(node):
                            try:
                                yield from self._texts(given, scope)
                            except Unreadable as error:
                                raise Unreadable(f"{file}:{given.lineno}: {error}") from None

    def _texts(self, node: ast.expr, scope: ast.AST) -> Iterator[str]:
        """What ``node``, an expression of ``scope``, can be."""
        match node:
            case ast.Constant(value=str(text)):
                yield text
            case ast.Constant(value=None) | ast.JoinedStr():
                pass  # a prefix before a reason that is found where it is given
            case ast.IfExp():
                yield from self._any([node.body, node.orelse], scope)
            case ast.BoolOp():
                yield from self._any(node.values, scope)
            case ast.NamedExpr() | ast.Starred():
                yield from self._texts(node.value, scope)
            case ast.BinOp():
                yield from self._any([node.left, node.right], scope)
            case ast.Tuple(elts=[ast.Constant() as name, _]):
                yield from self._texts(name, scope)  # a row of a table: reason, whether it holds
            case ast.List() | ast.Tuple():
                yield from self._any(node.elts, scope)
            case ast.Dict():
                yield from self._any(node.values, scope)
            case ast.ListComp() | ast.GeneratorExp():
                yield from self._texts(node.generators[0].iter, scope)
            case ast.Subscript(slice=ast.Constant(value=name)) if name in _PASSED_ON:
                pass
            case ast.Subscript():
                yield from self._texts(node.value, scope)
            case ast.Attribute(attr=name) if name in _PASSED_ON:
                pass
            case ast.Name(id=name):
                yield from self._named(name, scope)
            case ast.Call():
                yield from self._called(node, scope)
            case _:
                raise Unreadable(f"{ast.unparse(node)} may be anything")

    def _any(self, nodes: list[ast.expr], scope: ast.AST) -> Iterator[str]:
        for node in nodes:
            yield from self._texts(node, scope)

    def _named(self, name: str, scope: ast.AST) -> Iterator[str]:
        """A name is an argument, which callers give; or local; or a module's constant."""
        values = [v for node in _inside(scope) for v in _assigned(node, name)]
        if isinstance(scope, Function) and name in _arguments(scope):
            if name not in _PASSED_ON:
                yield from self._argued(name, scope)
        elif not values:
            if name not in self._constants:
                raise Unreadable(f"{name} is assigned nowhere here")
            values = [self._constants[name]]
        for value in values:
            if value not in self._followed:
                self._followed.add(value)
                yield from self._texts(value, scope)

    def _argued(self, name: str, function: Function) -> Iterator[str]:
        """What the calls of ``function`` give for its argument ``name``."""
        position = [a.arg for a in function.args.args if a.arg != "self"].index(name)
        calls = [
            (node, scope)
            for module in self._modules.values()
            for scope in ast.walk(module)
            if isinstance(scope, Function)
            for node in _inside(scope)
            if isinstance(node, ast.Call) and _callee(node) == function.name
        ]
        if not calls:
            raise Unreadable(f"nobody calls {function.name}() with {name}")
        for call, scope in calls:
            if call not in self._followed:
                self._followed.add(call)
                yield from self._texts(call.args[position], scope)

    def _called(self, call: ast.Call, scope: ast.AST) -> Iterator[str]:
        match (name := _callee(call)), call.args:
            case (("failure" | "_failure"), _):
                where = call.args[0]
                yield from (f"internal_error:{text}" for text in self._texts(where, scope))
            case "get", [_, default] if isinstance(call.func, ast.Attribute):
                yield from self._any([call.func.value, default], scope)
            case (("next" | "union" | "list"), [first, *_]):
                yield from self._texts(first, scope)
            case (("filter" | "map"), [function, values]):
                if isinstance(function, ast.Name):
                    yield from self._returned(function.id)
                if name == "filter":
                    yield from self._texts(values, scope)
            case _:
                yield from self._returned(name)

    def _returned(self, name: str) -> Iterator[str]:
        if name not in self._functions:
            raise Unreadable(f"{name}() is not defined here")
        for function in self._functions[name]:
            for node in _inside(function):
                if isinstance(node, ast.Return) and node.value is not None and node not in self._followed:
                    self._followed.add(node)
                    yield from self._texts(node.value, function)


def _inside(scope: ast.AST) -> Iterator[ast.AST]:
    """The nodes of a function or a class, without those of functions and classes in it."""
    for child in ast.iter_child_nodes(scope):
        if not isinstance(child, Function | ast.ClassDef | ast.Lambda):
            yield child
            yield from _inside(child)


def _callee(call: ast.Call) -> str:
    return call.func.attr if isinstance(call.func, ast.Attribute) else ast.unparse(call.func)


def _arguments(function: Function) -> set[str]:
    return {a.arg for a in (*function.args.args, *function.args.kwonlyargs)}


def _given(node: ast.AST) -> Iterator[ast.expr]:
    """The expressions that ``node`` puts in a reason's place."""
    match node:
        case ast.Call(func=ast.Name(id="Decline") | ast.Attribute(attr="Decline")):
            yield from node.args[:1]
            yield from (k.value for k in node.keywords if k.arg == "reason")
        case ast.Call(func=ast.Attribute(attr=verb, value=holder)) if verb in _ADDS and _name(holder) in FIELDS:
            yield node.args[-1]
        case ast.Dict():
            yield from (v for k, v in zip(node.keys, node.values, strict=True) if _key(k) in FIELDS)
        case ast.Call(func=ast.Name(id=name) | ast.Attribute(attr=name)) if name in ("decline", "_decline"):
            yield node.args[:2][-1]  # behind the request's state, where there is one
        case ast.Call(func=ast.Name(id="new_report"), args=[_, declined, *_]):
            yield declined
        case ast.Assign(targets=[ast.Tuple(elts=targets)], value=ast.Tuple(elts=values)):
            yield from (v for t, v in zip(targets, values, strict=True) if _name(t) in FIELDS)
        case ast.Assign() | ast.AnnAssign() | ast.AugAssign() if node.value is not None:
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            yield from (node.value for t in targets if _name(t) in FIELDS)
    if isinstance(node, ast.Call):
        yield from (k.value for k in node.keywords if k.arg in FIELDS)


def _name(target: ast.expr) -> str:
    match target:
        case ast.Name(id=name) | ast.Attribute(attr=name) | ast.Subscript(slice=ast.Constant(value=str(name))):
            return name
        case ast.Subscript():
            return _name(target.value)
    return ""


def _key(key: ast.expr | None) -> object:
    return key.value if isinstance(key, ast.Constant) else None


def _assigned(node: ast.AST, name: str) -> Iterator[ast.expr]:
    """What ``node`` puts into the local ``name``."""
    match node:
        case ast.Assign(targets=[ast.Tuple(elts=targets)], value=ast.Tuple(elts=values)):
            yield from (v for t, v in zip(targets, values, strict=True) if _name(t) == name)
        case ast.Assign(targets=[target]) if _name(target) == name:
            yield node.value
        case ast.AnnAssign() | ast.AugAssign() | ast.NamedExpr() if _name(node.target) == name and node.value:
            yield node.value
        case ast.comprehension(target=ast.Tuple(elts=[ast.Name(id=first), *_])) if first == name:
            yield node.iter
        case ast.Call(func=ast.Attribute(attr="append", value=ast.Name(id=holder)), args=[item]) if holder == name:
            yield item
