variable "name" {
  type        = string
  description = "Begins the name of everything. The inventory is named by the environment's folder."

  validation {
    condition     = can(regex("^[a-z][a-z0-9-]{1,30}[a-z0-9]$", var.name))
    error_message = "name: use 3 to 32 lower-case letters, digits and hyphens, a letter first, for example clickstream-dev."
  }
}

variable "region" {
  type        = string
  description = "Region of everything, the provider's too."

  validation {
    condition     = can(regex("^[a-z]{2}(-[a-z]+)+-[0-9]$", var.region))
    error_message = "region: give the name of a region, for example us-east-1."
  }
}

variable "zones" {
  type        = list(string)
  description = "The region's zones that a, b and c are. Without it its first three; a zone that has subnets keeps its letter."
  default     = null

  validation {
    condition     = var.zones == null || try(length(var.zones) == 3 && alltrue([for zone in var.zones : startswith(zone, var.region)]), false)
    error_message = "zones: name three zones of the region, for example [\"us-east-1a\", \"us-east-1c\", \"us-east-1d\"], or leave it out."
  }
}

variable "network_cidr" {
  type        = string
  description = "Private addresses of the network, /16 to /20."
  default     = "10.20.0.0/16"

  validation {
    condition = (
      can(regex("^(10\\.|172\\.(1[6-9]|2[0-9]|3[01])\\.|192\\.168\\.)", var.network_cidr)) &&
      can(cidrhost(var.network_cidr, 0)) && can(regex("/(1[6-9]|20)$", var.network_cidr))
    )
    error_message = "network_cidr: give a private network from /16 to /20, for example 10.20.0.0/16."
  }
}

variable "nat_gateways" {
  type        = number
  description = "NAT gateways: 1 is cheap, 3 keep each zone's way out when another zone fails."
  default     = 1

  validation {
    condition     = contains([1, 2, 3], var.nat_gateways)
    error_message = "nat_gateways: give 1, 2 or 3; there are three zones."
  }
}

variable "flow_log_days" {
  type        = number
  description = "Days that the network's flow logs are kept."
  default     = 30

  validation {
    condition     = contains([1, 3, 5, 7, 14, 30, 60, 90, 120, 180, 365], var.flow_log_days)
    error_message = "flow_log_days: give one of 1, 3, 5, 7, 14, 30, 60, 90, 120, 180 and 365."
  }
}

variable "admin_cidrs" {
  type        = list(string)
  description = "Networks that may reach the bastion's SSH."

  validation {
    condition     = length(var.admin_cidrs) > 0 && alltrue([for cidr in var.admin_cidrs : can(cidrnetmask(cidr))])
    error_message = "admin_cidrs: give at least one IPv4 network, for example [\"203.0.113.7/32\"], the address that you come from."
  }
  validation {
    condition = alltrue([
      for cidr in var.admin_cidrs : try(tonumber(split("/", cidr)[1]) >= 16, false)
    ])
    error_message = "admin_cidrs: a network wider than /16 is open to strangers; give your own, for example 203.0.113.7/32."
  }
}

variable "admin_public_key" {
  type        = string
  description = "Public SSH key of the admin, one line in OpenSSH's format."

  validation {
    condition     = can(regex("^(ssh-ed25519|ssh-rsa|ecdsa-sha2-nistp[0-9]+) [A-Za-z0-9+/=]+( .*)?$", var.admin_public_key))
    error_message = "admin_public_key: give the line of your .pub file, for example the content of ~/.ssh/id_ed25519.pub."
  }
}

variable "ami_id" {
  type        = string
  description = "Image of new machines, a Debian 12 or 13. Without it, the newest Debian 13 that Debian has published."
  default     = null

  validation {
    condition     = var.ami_id == null || can(regex("^ami-[0-9a-f]{8,17}$", var.ami_id))
    error_message = "ami_id: give ami- and its number, or leave it out for the newest Debian 13."
  }
}

variable "nodes" {
  type = map(object({
    groups   = list(string)
    size     = string
    zone     = string
    id       = optional(number, 1)
    root_gib = optional(number, 30)
    disks    = optional(map(object({ size_gib = number, mount = string, letter = optional(string, "f") })), {})
  }))
  description = "Node to its groups in the inventory, size (prices.yaml), zone (a, b or c), number among brokers and ZooKeepers, and data disks by name. Numbers and letters are of what has data: never change one."

  validation {
    condition     = length(var.nodes) > 0 && alltrue([for node, _ in var.nodes : can(regex("^[a-z][a-z0-9-]{0,20}$", node))])
    error_message = "nodes: name at least one; a name is up to 21 lower-case letters, digits and hyphens, a letter first."
  }
  validation {
    condition = alltrue([
      for node in values(var.nodes) : length(node.groups) > 0 && length(setsubtract(node.groups, local.groups)) == 0
    ])
    error_message = "nodes: each needs groups from this list: ${join(", ", local.groups)}."
  }
  validation {
    condition     = alltrue([for node in values(var.nodes) : length(setintersection(node.groups, ["hdfs_namenode", "hdfs_datanode"])) == 0])
    error_message = "nodes: the lake is on S3 here; remove hdfs_namenode and hdfs_datanode."
  }
  validation {
    condition     = alltrue([for node in values(var.nodes) : contains(keys(local.prices.sizes), node.size)])
    error_message = "nodes: size is one of ${join(", ", keys(local.prices.sizes))}; add a line to terraform/prices.yaml for another."
  }
  validation {
    condition     = alltrue([for node in values(var.nodes) : contains(["a", "b", "c"], node.zone)])
    error_message = "nodes: zone is a, b or c."
  }
  validation {
    condition = alltrue(flatten([
      for node in values(var.nodes) : [
        for disk in values(node.disks) : disk.size_gib >= 8 && disk.size_gib <= 16384 && can(regex("^/[a-z][a-z/_-]*[a-z]$", disk.mount))
      ]
    ]))
    error_message = "nodes: a disk has a size_gib from 8 to 16384 and a mount such as /var/lib/kafka."
  }
  validation {
    condition = alltrue([
      for node in values(var.nodes) : length(distinct([for disk in node.disks : disk.mount])) == length(node.disks)
    ])
    error_message = "nodes: give each disk of a node a mount of its own."
  }
  validation {
    condition = alltrue([
      for node in values(var.nodes) : length(distinct([for disk in node.disks : disk.letter])) == length(node.disks) &&
      alltrue([for disk in node.disks : can(regex("^[f-p]$", disk.letter))])
    ])
    error_message = "nodes: give each disk of a node a letter of its own, from f to p, and let those that are there keep theirs."
  }
  validation {
    condition = alltrue([
      for group in ["kafka", "zookeeper"] :
      length(distinct([for node in var.nodes : node.id if contains(node.groups, group)])) == length([for node in var.nodes : 1 if contains(node.groups, group)])
    ]) && alltrue([for node in var.nodes : node.id >= 1 && node.id <= 255 && floor(node.id) == node.id])
    error_message = "nodes: give each broker and ZooKeeper an id of its own, from 1 to 255, and let those that are there keep theirs."
  }
  validation {
    condition     = alltrue([for node in values(var.nodes) : node.root_gib >= 16])
    error_message = "nodes: root_gib is 16 or more; Spark and Airflow alone take 4 GiB."
  }
  validation {
    condition     = length([for node in var.nodes : 1 if contains(node.groups, "zookeeper")]) % 2 == 1
    error_message = "nodes: the number of nodes in the group zookeeper has to be odd, or a majority costs one more for nothing; add or remove one."
  }
  validation {
    condition = alltrue([
      for group in ["spark_master", "postgres", "airflow", "pipeline"] :
      length([for node in var.nodes : 1 if contains(node.groups, group)]) == 1
    ])
    error_message = "nodes: exactly one node is in each of spark_master, postgres, airflow and pipeline."
  }
  validation {
    condition = alltrue([
      for group in ["kafka", "spark_worker"] : length([for node in var.nodes : 1 if contains(node.groups, group)]) > 0
    ])
    error_message = "nodes: put at least one node into each of kafka and spark_worker."
  }
}

variable "kafka_replication_factor" {
  type        = number
  description = "Copies of each record of the topic. Without it 3, or as many as there are brokers."
  default     = null

  validation {
    condition = var.kafka_replication_factor == null || try(
      var.kafka_replication_factor >= 1 && floor(var.kafka_replication_factor) == var.kafka_replication_factor &&
      var.kafka_replication_factor <= length([for node in var.nodes : 1 if contains(node.groups, "kafka")]), false
    )
    error_message = "kafka_replication_factor: give a whole number from 1 to the number of nodes in the group kafka; lower it or add brokers."
  }
}

variable "lake_prefix" {
  type        = string
  description = "Where in the bucket the tables are. A platform that is made anew beside a lake that was kept needs another."
  default     = "lake"

  validation {
    condition     = can(regex("^[a-z0-9][a-z0-9-]{0,30}$", var.lake_prefix)) && var.lake_prefix != "spark-events"
    error_message = "lake_prefix: give lower-case letters, digits and hyphens, for example lake-2; spark-events is taken."
  }
}

variable "lake_keep_versions_days" {
  type        = number
  description = "Days that replaced and deleted objects of the lake can still be had back."
  default     = 7

  validation {
    condition     = var.lake_keep_versions_days >= 1 && var.lake_keep_versions_days <= 365
    error_message = "lake_keep_versions_days: give 1 to 365."
  }
}

variable "inventory_variables" {
  type        = any
  description = "Further variables of the roles for all nodes, as group_vars would have them; preflight checks names and types."
  default     = {}

  validation {
    condition     = can(keys(var.inventory_variables))
    error_message = "inventory_variables: give a map of variables, for example {spark_worker_memory = \"2g\"}."
  }
  validation {
    condition = !anytrue([
      for name in try(keys(var.inventory_variables), []) : can(regex("^(ansible_.*|.*_port|lake_uri|spark_event_log_dir)$", name))
    ])
    error_message = "inventory_variables: remove lake_uri, spark_event_log_dir, ansible_* and *_port; lake_prefix says where the tables are, and terraform/traffic.yaml which ports are open."
  }
  validation {
    condition = !anytrue([
      for name in try(keys(var.inventory_variables.spark_config), []) : can(regex("\\.port(\\.|$)|endpoint\\.region$", name))
    ])
    error_message = "inventory_variables: remove ports and the region from spark_config; they follow from terraform/traffic.yaml and region."
  }
  validation {
    condition     = var.kafka_replication_factor == null || !can(var.inventory_variables.kafka_topics)
    error_message = "inventory_variables: kafka_topics says how many copies there are; leave kafka_replication_factor out."
  }
}
