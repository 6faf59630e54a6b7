{ ... }: { } # [%%nodeName%%] stays: modules are sent as they are
