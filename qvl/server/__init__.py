"""The HTTP server: requests of others to answers of a backend. Its files, in the best order to read them:

    options start run                       what may be set, and one server from its start to its end
    supervisor http_process http_setup      the same with several HTTP processes
    app border hosts auth limits            the layers that a request passes before its route
    routes pages openapi failures           what an address answers, and how an error is told
    service counts metrics overflow         what the routes share
    sse http_protocol http_parser door      bytes: events of a stream, heads of requests, the socket

None of them loads torch.
"""
