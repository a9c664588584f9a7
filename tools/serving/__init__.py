"""``python -m tools.serving``: run what graftc writes in serving engines, and compare the tokens.

`methods` says what is adapted, `forms` writes it in the forms that engines read, `cells` runs the engines, and `page`
renders the results, which are kept in docs/serving.json.
"""
