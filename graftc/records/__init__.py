"""Records: what graftc states about models, folds and files, as frozen data without torch.

Each field is documented once: by the text below it, or by its type (`fields`) if several records have it. Writing,
reading and JSON Schema follow from the class.
"""
