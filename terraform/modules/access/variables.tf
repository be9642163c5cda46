variable "name" {
  type        = string
  description = "Begins the name of everything made here."
}

variable "vpc_id" {
  type        = string
  description = "The network of the security groups."
}

variable "public_subnet_id" {
  type        = string
  description = "Where the bastion is."
}

variable "nodes" {
  type        = map(list(string))
  description = "Node to its groups in the inventory."
}

variable "traffic" {
  type        = list(object({ from = string, to = string, ports = list(string), why = string }))
  description = "Who talks to whom, on which TCP ports; a port or a range such as 7100-7131."

  validation {
    condition     = alltrue([for row in var.traffic : row.to != "internet" || row.from != "admin"])
    error_message = "traffic: admin to internet is nothing that a rule here could say; remove the line."
  }
}

variable "lake_groups" {
  type        = list(string)
  description = "Groups whose nodes read and write the lake."
}

variable "lake" {
  type        = object({ bucket_arn = string, key_arn = string })
  description = "The lake's bucket and key."
}

variable "admin_cidrs" {
  type        = list(string)
  description = "Networks that reach the bastion."
}

variable "admin_public_key" {
  type        = string
  description = "Public key of the admin, in OpenSSH's format."
}

variable "bastion" {
  type        = object({ ami_id = string, type = string })
  description = "Image and instance type of the bastion."
}
