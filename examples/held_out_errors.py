"""Rows like those that a model gets wrong on a set that must stay held out: here of five classes, rare in the pool.

The held-out rows are labelled, and no model is trained on them.
"""

import numpy as np
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression

from queryselect import Client

x, y = load_digits(return_X_y=True)
order = np.random.default_rng(0).permutation(len(y))
test, held_out, pool = order[:400], order[400:700], order[700:]
pool = pool[(y[pool] < 5) | (np.arange(len(pool)) % 10 == 0)]  # of classes 5 to 9 a tenth

with Client("local:") as client:  # or Client("localhost:50051")
    for strategy in ("random", "fisher_kernel"):
        rows = np.arange(40)  # with labels
        for _ in range(5):
            model = LogisticRegression(max_iter=2000).fit(x[pool[rows]], y[pool[rows]])
            known = {"embeddings": x[pool], "probabilities": model.predict_proba(x[pool])}
            if strategy == "fisher_kernel":
                known["params"] = {"kernel": "LAST_LAYER", "pseudo_label": "PREDICTED"}
                known["reference"] = {
                    "embeddings": x[held_out],
                    "probabilities": model.predict_proba(x[held_out]),
                    # Their labels would say more, with the default pseudo_label; this is the least that is to be told.
                    "misclassified": model.predict(x[held_out]) != y[held_out],
                }
            picks = client.select(strategy, budget=10, labeled=rows, **known)
            rows = np.append(rows, picks.indices)
        model = LogisticRegression(max_iter=2000).fit(x[pool[rows]], y[pool[rows]])
        print(
            f"{strategy}: {np.mean(y[pool[rows[40:]]] >= 5):.0%} of the picks are of rare classes,"
            f" {model.score(x[test], y[test]):.0%} of the test set is then right"
        )
