"""A campaign of random models, specs and routes, in which every route has to compute what an eager model computes.

A seed draws a *case*: the description of a model, a spec, and two routes (`grammar`, `library`, `specs`, `case`). The
model is built, compiled and perturbed in place of training. Its outputs and gradients are compared with those of the
eager model, whose weights `reference` changes by the formulas of the papers, without graftc's graphs, sites or folds.
Then the same outputs are expected from both routes (`routes`). A route may refuse with a documented code; everything
else that is not equal is a finding, which `minimising` reduces to a script of a few lines.

``python -m tools.campaign --seeds 0:1000`` runs seeds, each in a process of its own, and resumes (`running`).
"""
