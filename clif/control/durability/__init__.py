"""What a crash must not lose, and how the next start continues with it. Free of torch.

journal: the file of lines. ledger: which lines are written when, and the rows that they restore. recovery: from the
lines of earlier starts, what is left to do. shutdown: what ends a run early, and whether open requests outlive that.
"""
