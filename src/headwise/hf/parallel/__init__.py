"""Contexts over several processes (context parallelism): who they are, what each of them holds,
how their attention is put together, and how they stay alike.

Source: the merge of partial attention by its log-sum-exp, as ring attention does it (Liu et al.
2023, arXiv 2310.01889), here with one gather; MLA and GQA alike.
"""
