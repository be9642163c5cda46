variable "name" {
  type        = string
  description = "Begins the name of everything made here."
}

variable "nodes" {
  type = map(object({
    type             = string
    subnet_id        = string
    zone             = string
    root_gib         = number
    disks            = map(object({ size_gib = number, mount = string, letter = string }))
    security_group   = string
    instance_profile = optional(string)
  }))
  description = "Node to its instance type, place, disks (by name), security group and, where it uses the lake, profile."
}

variable "ami_id" {
  type        = string
  description = "Image of new nodes; those that are there keep theirs."
}

variable "key_name" {
  type        = string
  description = "The admin's key pair."
}
