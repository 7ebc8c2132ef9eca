"""Make another model live: re-embed every collection while the service goes on answering, then switch.

    1  record the model as a candidate; every replica loads it and from then on writes vectors of both models
    2  list the items whose image can no longer be read, and decide about them
    3  embed what the candidate's collections lack, from stored originals or readable sources
    4  when nothing is lacking and every replica has loaded the candidate: switch all collections in one transaction,
       then make the generation live
    5  for a stated window the former vectors still get every write, so that `rollback` is one call

What makes a migration impossible is found before step 1. Each step can be repeated. If the process is killed, the next
call goes on where this one stopped. Which model answers a request is decided by the tag of its collection, so at no
moment can an answer mix two models.
"""
