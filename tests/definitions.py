"""What a Python file defines, read from its syntax tree without an import."""

import ast


def is_overload(decorator):
    """Whether a decorator says that a definition is one of several types of the next function."""
    return isinstance(decorator, ast.Name) and decorator.id == "overload"


def defined(tree):
    """Public names that a module binds at its top level, without those that it imports."""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and any(map(is_overload, node.decorator_list)):
            continue
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names = [node.name]
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names = [n.id for t in targets for n in ast.walk(t) if isinstance(n, ast.Name)]
        else:
            continue
        yield from (name for name in names if not name.startswith("_"))
