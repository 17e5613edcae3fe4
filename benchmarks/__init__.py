"""Speed and memory of the library, beside other ways to the same results, and the pages made from them.

One file per benchmark: penalty, importance, step, omega, language, lam; `all` runs those of time.
performance and readme write pages. The clock and the penalty's forms are in mas_ext/comparison.
"""
