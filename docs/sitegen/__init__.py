"""Tables, figures and pages of the site, written from the project's records while the site is built.

`extension` is what Sphinx loads: the `{records}` directive, which calls a function of `records`. `models`, `runs`,
`speed` and `transfer` register functions: tables of the registry, of `docs/runs` and of `benchmarks/results`. `figures`
and `diagram` draw, and `pages` writes a page for each variant. Nothing here measures.
"""
