"""Who answers requests, on one asyncio loop and without torch. Its files, in the best order to read them:

    base echo                               what a backend is, and one without a model
    local                                   one with an engine process
    preparing submit scratch room           a request until the engine has it, and where its pixels lie
    answers merge                           tokens to deltas, and several streams as one
    engines process link                    where the engine comes from, and what happens when it dies
    grammar_check                           a constraint tried out in a process of its own

None of them loads torch.
"""
