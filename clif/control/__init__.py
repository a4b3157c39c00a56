"""The control process: accepts, routes and follows requests, decides which replicas train, and records both.

server: the loop. Around it: inbox and claims (what replicas send), dispatcher (requests), fleet (replicas), federation
and rounds (training), failures, policy_loop (decisions every control.period_s), run_phases, recorder (tables and
journal), reporter (display). ports: what it is connected to. Free of torch.
"""
