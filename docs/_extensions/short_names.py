"""Public names as docstrings write them: `top_k` for ``moejax.top_k``, wherever it stands."""

PLACES = ["moejax", "moejax.base", "moejax.sharding"]


def resolve(app, env, node, contnode):
    """A link to a public name that Sphinx did not find in the module which mentions it."""
    if node.get("refdomain") != "py":
        return None
    python = env.domains["py"]
    names = (f"{place}.{node['reftarget']}" for place in PLACES)
    name = next((name for name in names if name in python.objects), None)
    if name is None:
        return None
    return python.resolve_xref(env, node["refdoc"], app.builder, "obj", name, node, contnode)


def setup(app):
    """Connects to the event that Sphinx sends for a link without a target."""
    app.connect("missing-reference", resolve)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
