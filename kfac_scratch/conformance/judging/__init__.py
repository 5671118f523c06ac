"""How an answer is judged: truth, layouts, verdicts in words, processes of their own, reports."""
